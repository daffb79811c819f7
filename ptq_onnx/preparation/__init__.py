"""From a file to the graph that is quantized: reading, validation, cleaning, sizes, signature."""
