"""Texts that should not leave a log: credentials, and marks of a person. What is found is named by kind, never shown.

Credentials are found by the library detect-secrets, but for its search by entropy, which in plain text sees some everywhere; in
its place stands a rule for long words of mixed characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..core.errors import UserError

PLUGINS = (
    "ArtifactoryDetector",
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "CloudantDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "IbmCloudIamDetector",
    "IbmCosHmacDetector",
    "JwtTokenDetector",
    "KeywordDetector",
    "MailchimpDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SoftlayerDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
TOKEN = re.compile(r"[A-Za-z0-9_+/=-]{24,}")
"""A word as long as a key; one with capitals, small letters and digits, or a hexadecimal one, counts as such."""
HEX = re.compile(r"[0-9a-fA-F]{32,}")
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
PHONE = re.compile(r"(?<![\w.])\+\d[\d ()./-]{7,}\d(?![\w])")
"""International numbers; national ones look like any other."""
CARD = re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?![\d.])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")


def secrets_in(text: str) -> Iterator[str]:
    """The kinds of secrets in a text, each time one is found. Raises UserError where detect-secrets is not installed."""
    try:
        from detect_secrets.core.scan import scan_line
        from detect_secrets.settings import transient_settings
    except ImportError:
        raise UserError(
            "prompts are collected without secrets, which detect-secrets finds: pip install 'redraft[collect]'"
        ) from None
    with transient_settings({"plugins_used": [{"name": name} for name in PLUGINS]}):
        for line in text.splitlines():
            yield from (found.type for found in scan_line(line))
    words = TOKEN.findall(text)
    if any(_is_key(word) for word in words) or HEX.search(text):
        yield "long token"
    if EMAIL.search(text):
        yield "e-mail address"
    if PHONE.search(text):
        yield "telephone number"
    if any(_is_card(found) for found in CARD.findall(text)):
        yield "card number"
    if any(_is_iban(found) for found in IBAN.findall(text)):
        yield "IBAN"


def _is_key(word: str) -> bool:
    kinds = (str.isupper, str.islower, str.isdigit)
    return all(any(kind(letter) for letter in word) for kind in kinds)


def _is_card(text: str) -> bool:
    """By the check digit (Luhn, ISO/IEC 7812-1)."""
    digits = [int(letter) for letter in text if letter.isdigit()][::-1]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0 and any(digits)


def _is_iban(text: str) -> bool:
    """By its check digits (ISO 13616)."""
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1
