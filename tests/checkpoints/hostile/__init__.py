"""Tables of damaged and hostile checkpoints, for test_hostile."""
