//! Bare HTTP: what the clients' libraries hide.

use crate::daemon::shared;

crate::tests! {
    a_ping_says_what_clients_negotiate_with,
    versions_outside_of_the_range_are_refused_in_dockerds_words,
    unknown_pages_and_methods_are_not_found,
    malformed_bodies_are_refused_clearly,
    swarm_calls_say_that_there_is_no_swarm,
    the_builders_session_is_refused_clearly,
    events_begin_at_once_and_end_at_until,
}

fn a_ping_says_what_clients_negotiate_with() {
    let daemon = shared();
    for method in ["GET", "HEAD"] {
        let (head, body) = daemon.http(&format!(
            "{method} /_ping HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
        ));
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        let lower = head.to_ascii_lowercase();
        for header in [
            "api-version: 1.50",
            "docker-experimental: false",
            "ostype: linux",
            "builder-version: 1",
            "server: berth/",
            "cache-control: no-cache, no-store, must-revalidate",
        ] {
            assert!(lower.contains(header), "{header} is not in {head}");
        }
        assert_eq!(body, if method == "GET" { "OK" } else { "" });
    }
}

fn versions_outside_of_the_range_are_refused_in_dockerds_words() {
    let daemon = shared();
    let (head, body) = daemon.get("/v1.23/_ping");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(
        body.contains("client version 1.23 is too old. Minimum supported API version is 1.24"),
        "{body}"
    );
    let (_, body) = daemon.get("/v1.51/version");
    assert!(
        body.contains("client version 1.51 is too new. Maximum supported API version is 1.50"),
        "{body}"
    );
    for version in ["/v1.24", "/v1.41", "/v1.50", ""] {
        let (head, body) = daemon.get(&format!("{version}/version"));
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(
            body.contains("\"ApiVersion\":\"1.50\",\"MinAPIVersion\":\"1.24\""),
            "{body}"
        );
    }
}

fn unknown_pages_and_methods_are_not_found() {
    let daemon = shared();
    for request in [
        "GET /nothing",
        "DELETE /info",
        "GET /v1.41/containers/a/b/c",
        "POST /images/a/b",
    ] {
        let (head, body) = daemon.http(&format!(
            "{request} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
        ));
        assert!(head.starts_with("HTTP/1.1 404"), "{request}: {head}");
        assert_eq!(body.trim(), "{\"message\":\"page not found\"}", "{request}");
    }
}

fn malformed_bodies_are_refused_clearly() {
    let daemon = shared();
    let (head, body) = daemon.post("/v1.41/containers/create", "{\"Image\": ");
    assert!(
        head.starts_with("HTTP/1.1 400") && body.contains("invalid JSON"),
        "{head} {body}"
    );
    let (head, body) = daemon.post("/v1.41/containers/create", "");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(
        body.contains("config cannot be empty in order to create a container"),
        "{body}"
    );
    let (_, body) = daemon.post("/containers/create", "{\"HostConfig\":{\"Memory\":\"x\"}}");
    assert!(body.contains("invalid JSON: HostConfig"), "{body}");
    let (_, body) = daemon.http(
        "POST /volumes/create HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
    );
    assert!(
        body.contains("unsupported Content-Type header (text/plain): must be 'application/json'"),
        "{body}"
    );
    let (head, _) = daemon.get("/volumes?filters=%7B");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    let (head, _) = daemon.get("/volumes?filters=%7B%22color%22%3A%5B%22red%22%5D%7D");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    let long = " ".repeat(9 << 20);
    let (head, _) = daemon.post("/volumes/create", &long);
    assert!(head.starts_with("HTTP/1.1 413"), "{head}");
}

fn swarm_calls_say_that_there_is_no_swarm() {
    let daemon = shared();
    for path in [
        "/swarm",
        "/nodes",
        "/services",
        "/v1.41/tasks",
        "/secrets",
        "/configs/x",
    ] {
        let (head, body) = daemon.get(path);
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        assert!(body.contains("This node is not a swarm manager."), "{body}");
    }
    assert_eq!(daemon.get("/plugins").1, "[]");
}

fn the_builders_session_is_refused_clearly() {
    let daemon = shared();
    for path in ["/session", "/grpc"] {
        let (head, body) = daemon.http(&format!(
            "POST {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n"
        ));
        assert!(head.starts_with("HTTP/1.1 501"), "{head}");
        assert!(body.contains("DOCKER_BUILDKIT=0"), "{body}");
    }
}

fn events_begin_at_once_and_end_at_until() {
    let daemon = shared();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    daemon.post("/volumes/create", "{\"Name\":\"events-volume\"}");
    let (head, body) = daemon.get(&format!("/events?since={now}&until={}", now + 1));
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(
        body.contains("\"Type\":\"volume\",\"Action\":\"create\""),
        "{body}"
    );
}
