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
ALLOWLIST = "detect_secrets.filters.allowlist.is_line_allowlisted"
"""A filter of detect-secrets by which a comment in the text switches the search off."""
TOKEN = re.compile(r"[A-Za-z0-9_+/=-]{24,}")
"""A word as long as a key; one with capitals, small letters and digits counts as such."""
PLAIN = re.compile(r"[A-Za-z0-9]{24,}")
"""The same without signs; one with letters and digits counts as a key."""
ASSIGNED = re.compile(
    r"(?i)(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key)[\w-]*[\"']?\s*(?:[:=]|\bis\b)\s*[\"']?"
    r"([^\s\"',;(){}\[\]<>]{6,})"
)
"""A value without quotes after the name of a secret; one with a digit counts."""
BEARER = re.compile(r"(?i)\bbearer\s+[\w.~+/-]{16,}")
EMAIL = re.compile(r"[\w+-]@[\w-]{1,63}(?:\.[\w-]{1,63})+")
"""From the last character before the sign on, so that long words cost no more than their length."""
PHONE = re.compile(r"(?<![\w.])\+\d[\d ()./-]{7,}\d(?!\w)")
"""International numbers; national ones look like any other."""
DIGITS = re.compile(r"\d(?:[ \-\u00a0\u202f]?\d){12,}|\d{4}(?:\.\d{4}){3}")
"""Long enough for a card's number, which may be a part of it."""
IBAN = re.compile(r"(?i)\b[A-Z]{2}\d{2}(?:[ \u00a0]?[A-Z0-9]){11,}")
"""Long enough for an IBAN, which may be the beginning of it."""


def secrets_in(text: str) -> Iterator[str]:
    """The kinds of secrets in a text, each time one is found. Raises UserError where detect-secrets is not installed."""
    try:
        from detect_secrets.core.scan import scan_line
        from detect_secrets.settings import transient_settings
    except ImportError:
        raise UserError(
            "prompts are collected without secrets, which detect-secrets finds: pip install 'redraft[collect]'"
        ) from None
    with transient_settings({"plugins_used": [{"name": name} for name in PLUGINS]}) as settings:
        settings.disable_filters(ALLOWLIST)
        for line in text.splitlines():
            yield from (found.type for found in scan_line(line))
    assigned = any(re.search(r"\d", value) for value in ASSIGNED.findall(text))
    if assigned or BEARER.search(text):
        yield "Secret Keyword"
    if any(map(_is_key, TOKEN.findall(text))) or any(map(_is_mixed, PLAIN.findall(text))):
        yield "long token"
    if EMAIL.search(text):
        yield "e-mail address"
    if PHONE.search(text):
        yield "telephone number"
    if any(_is_card(part) for found in DIGITS.findall(text) for part in _parts(found, 13, 19)):
        yield "card number"
    if any(_is_iban(part) for found in IBAN.findall(text) for part in _beginnings(found, 15, 34)):
        yield "IBAN"


def _is_key(word: str) -> bool:
    kinds = (str.isupper, str.islower, str.isdigit)
    return all(any(kind(letter) for letter in word) for kind in kinds)


def _is_mixed(word: str) -> bool:
    return not word.isalpha() and not word.isdigit()


def _beginnings(text: str, least: int, most: int) -> Iterator[str]:
    """The beginnings of a text that end with a whole word, of so many letters and digits, without what stands between."""
    words = re.split(r"[^A-Za-z0-9]", text)
    joined = ""
    for word in words:
        joined += word
        if least <= len(joined) <= most:
            yield joined


def _parts(text: str, least: int, most: int) -> Iterator[str]:
    """The same of all that begins with a whole word."""
    words = re.split(r"[^A-Za-z0-9]", text)
    for at in range(len(words)):
        yield from _beginnings(" ".join(words[at:]), least, most)


def _is_card(digits: str) -> bool:
    """By its first digit (those of cards of payment) and its check digit (Luhn, ISO/IEC 7812-1)."""
    numbers = [int(digit) for digit in digits][::-1]
    doubled = [2 * number - 9 * (number > 4) for number in numbers[1::2]]
    return digits[0] in "23456" and (sum(numbers[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """By its check digits (ISO 13616)."""
    moved = text[4:] + text[:4]
    return int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1
