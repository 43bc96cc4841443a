"""Other people's libraries, brought to behave."""
