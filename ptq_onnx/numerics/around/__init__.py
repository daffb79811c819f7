"""What is done around a code: to a tensor before, and behind the product that reads it."""
