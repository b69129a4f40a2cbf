"""`diffbench bench`: how fast everything is here, as a share of what this machine can do, measured in the same run."""
