"""The pages: what they show exists, what they state is what the code and the figures say."""
