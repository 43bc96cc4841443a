"""What proposers are made of, each without a task of its own. What they suggest changes nothing but speed."""
