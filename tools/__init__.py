import os

# Before torch is loaded: threads that wait for others in a loop slow down twentyfold where anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
