"""Other tools that train drafts, each in an environment of its own."""
