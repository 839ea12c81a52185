"""What a gateway replica answers behind the HAProxy under test."""

JSON = "application/json"
OUR_ID = f"req_{'0' * 32}"


# What a gateway replica, or Ray inside it, may answer: status, content type, body, request ids.
ANSWERS = {
    "/v1/models": (200, JSON, "{}", [OUR_ID]),
    "/readyz": (200, JSON, "{}", [OUR_ID]),
    "/limited": (429, JSON, "{}", [OUR_ID]),
    "/metrics": (200, "text/plain", "up 1", [OUR_ID]),
    "/refused": (401, JSON, "{}", [OUR_ID]),
    "/two-ids": (200, JSON, "{}", [OUR_ID, "chosen by the client"]),
    "/foreign-id": (200, JSON, "{}", ["chosen by the client"]),
    "/unparsed": (400, "text/plain", "Invalid HTTP request received.", []),
    "/lost": (404, "text/plain", "Path '/lost' not found. Ping ...", ["5a"]),
    "/timed-out": (408, "text/plain", "Request 5a timed out", ["5a"]),
    "/dropped": (503, "text/plain", "Request dropped due to backpressure", ["5a"]),
    "/dropped-json": (503, JSON, '{"detail": "gone"}', [OUR_ID]),
    "/crashed": (500, "text/plain", "Internal Server Error", []),
}
