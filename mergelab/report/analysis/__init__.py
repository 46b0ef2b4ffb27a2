"""The report of job=analyze: tables in the terminal, pictures, and their numbers as CSV."""
