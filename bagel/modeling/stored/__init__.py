"""Linear layers whose weight is stored in fewer bits than it is multiplied in, one module per format."""
