"""What two models say, scored and put into words."""
