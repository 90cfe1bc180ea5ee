"""Real serving engines: started, asked, counted and stopped, to try a draft where it will be served."""
