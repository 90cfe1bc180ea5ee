"""What is measured: acceptance, intervals, speed, equality of outputs."""
