"""What the fuzzers have found, each as the few lines that make it. The oracle judges them all."""
