"""Teacher, student and the top they share."""
