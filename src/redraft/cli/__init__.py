"""The command line: thin commands over `pipeline` and the packages it names.

Exit codes: 0 done, 2 the user's mistake (one sentence, no traceback), 1 our fault, 3 (`verify` and
`certify check`) tried in the engine and not fit to serve.
Machine-readable output (`--json`) goes to stdout, progress to stderr.
"""

from .app import app, main

__all__ = ["app", "main"]
