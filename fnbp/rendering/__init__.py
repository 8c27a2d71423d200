"""What is shown: tables in a terminal, and the API pages."""
