"""One definition of tau, measured by replay (exact, from saved answers) and live (loop and clock)."""
