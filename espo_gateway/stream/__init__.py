"""One choice of an answer: from the server's events to the client's, cut where it failed."""
