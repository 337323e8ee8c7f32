"""What function vectors are read from and written to: fixed trials, extraction and answers, the files made of them."""
