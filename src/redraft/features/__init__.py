"""The target's hidden states, stored on disk or read from other tools' stores."""
