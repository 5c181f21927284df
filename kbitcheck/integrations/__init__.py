"""What plugs into other libraries; each module imports the library of its name."""
