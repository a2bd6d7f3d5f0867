"""What a file or a folder is, and what would become of it: from headers and manifests, before anything is computed."""
