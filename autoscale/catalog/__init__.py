"""What can be bought: kinds of GPU, offers of them, and how fast they were measured to be."""
