"""What the world does to a run: kills, interrupts, a full disk, a second run at the same time."""
