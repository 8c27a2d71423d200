"""What statistics of single gradients cost."""
