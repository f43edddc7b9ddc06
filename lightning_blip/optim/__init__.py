"""The optimizer wrapper that keeps parameters within what their frozen bits allow."""
