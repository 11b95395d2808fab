"""What every script needs and neither paper is about: command line, files, checkpoints, runs, several processes."""
