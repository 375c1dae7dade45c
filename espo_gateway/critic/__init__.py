"""V from outside: a critic server, or a class of the user's own."""
