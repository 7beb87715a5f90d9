"""What this machine has, and lacks, for the work of aum-compress."""
