"""Servers: one HTTP client, engines started and stopped, their counters, and the trial of a draft in one."""
