"""Models that do a job: text in, text out."""
