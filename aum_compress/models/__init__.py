"""Model configuration, the selective scan, the Mamba mixer, Audio Mamba and its student, CP-Mobile."""
