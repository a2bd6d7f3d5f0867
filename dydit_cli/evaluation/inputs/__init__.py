"""What can be evaluated, and what it can be compared with: models, folders, archives, videos, statistics."""
