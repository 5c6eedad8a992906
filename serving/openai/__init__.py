"""OpenAI's routes and the form of their answers."""
