"""A study as one page: what its runs' files hold, compared, drawn and explained. It reads files, and starts no Ray."""
