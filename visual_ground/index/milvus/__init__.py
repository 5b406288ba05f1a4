"""Image indexes in Milvus: in a file on one machine (Milvus Lite), on a server, or in a cluster."""
