"""What a person reads at the end: a table on the terminal, a page in the browser."""
