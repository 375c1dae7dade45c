"""The clients' side: requests in, answers out, who may and how many at once."""
