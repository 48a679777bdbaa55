"""Score ``gate``: which weights serve the harm, learned."""
