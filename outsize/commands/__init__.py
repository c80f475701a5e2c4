"""What can be typed behind `outsize`: a file for each command. None imports anything heavy before it runs."""
