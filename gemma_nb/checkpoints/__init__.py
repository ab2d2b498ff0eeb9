"""Where weights come from; every reader yields the official parameter tree."""
