"""What a node serves to operators over HTTP."""
