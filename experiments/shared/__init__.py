"""What experiments share, one subject a file; nothing here knows of any one experiment."""
