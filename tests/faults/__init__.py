"""What the world does to a run: kills, interrupts, a full disk, another run into the same folder."""
