"""What a drafter keeps of a prefix: selection policies, views, and the caches that hold them."""
