"""The synchronous parts of proposers. What they suggest changes nothing but speed."""
