//! What lists and events show, and how they are chosen.

use crate::daemon::has_busybox;

crate::tests! {
    events_are_chosen_by_filters,
    lists_are_chosen_by_filters,
    filters_that_fit_nothing_are_refused,
    volumes_and_images_tell_what_happens_to_them,
    commands_and_tags_are_shown_as_dockers,
}

fn events_are_chosen_by_filters() {
    let Some(daemon) = has_busybox("event-filters") else {
        return;
    };
    daemon.docker(&[
        "run",
        "--name",
        "event-one",
        "--label",
        "color=red",
        "busybox",
        "true",
    ]);
    daemon.docker(&["run", "--name", "event-two", "busybox", "true"]);
    daemon.docker(&["rm", "event-one", "event-two"]);
    let events = |filters: &[&str]| {
        let until = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
            + 1;
        let until = until.to_string();
        let mut args = vec!["events", "--since", "5m", "--until", &until, "--format"];
        args.push("{{.Type}} {{.Action}} {{.Actor.Attributes.name}}");
        for filter in filters {
            args.extend(["--filter", filter]);
        }
        daemon.docker(&args)
    };
    let red = events(&["label=color=red"]);
    assert!(
        red.contains("die event-one") && !red.contains("event-two"),
        "{red}"
    );
    let died = events(&["type=container", "event=die", "container=event-two"]);
    assert_eq!(died, "container die event-two");
    let both = events(&["event=create", "event=destroy", "container=event-one"]);
    assert_eq!(
        both,
        "container create event-one\ncontainer destroy event-one"
    );
    let networks = events(&["type=network"]);
    assert!(
        networks.contains("network connect") && !networks.contains("container "),
        "{networks}"
    );
}

fn lists_are_chosen_by_filters() {
    let Some(daemon) = has_busybox("filters") else {
        return;
    };
    daemon.docker(&["volume", "create", "--label", "f=1", "filter-vol"]);
    daemon.docker(&["network", "create", "--label", "f=1", "filter-net"]);
    daemon.docker(&[
        "run",
        "-d",
        "--name",
        "filter-one",
        "--label",
        "f=1",
        "-v",
        "filter-vol:/v",
        "--network",
        "filter-net",
        "-p",
        "127.0.0.1::81",
        "busybox",
        "sleep",
        "1000",
    ]);
    daemon.docker(&[
        "create",
        "--name",
        "filter-two",
        "--label",
        "f=2",
        "busybox",
        "true",
    ]);
    let ps = |filter: &str| {
        daemon.docker(&[
            "ps",
            "-a",
            "--format",
            "{{.Names}}",
            "--filter",
            "name=filter-",
            "--filter",
            filter,
        ])
    };
    for (filter, wanted) in [
        ("label=f=1", "filter-one"),
        ("label=f=2", "filter-two"),
        ("status=created", "filter-two"),
        ("status=running", "filter-one"),
        ("volume=filter-vol", "filter-one"),
        ("network=filter-net", "filter-one"),
        ("publish=81/tcp", ""),
        ("expose=81/tcp", "filter-one"),
        ("ancestor=busybox", "filter-two\nfilter-one"),
        ("before=filter-two", "filter-one"),
        ("since=filter-one", "filter-two"),
        ("health=none", "filter-two\nfilter-one"),
        ("is-task=false", "filter-two\nfilter-one"),
        ("exited=9", ""),
    ] {
        assert_eq!(ps(filter), wanted, "{filter}");
    }
    let list = |args: &[&str]| daemon.docker(args);
    assert_eq!(
        list(&["volume", "ls", "-q", "--filter", "label=f=1"]),
        "filter-vol"
    );
    assert!(!list(&["volume", "ls", "-q", "--filter", "dangling=true"]).contains("filter-vol"));
    assert_eq!(
        list(&[
            "network",
            "ls",
            "--format",
            "{{.Name}}",
            "--filter",
            "label=f=1"
        ]),
        "filter-net"
    );
    assert!(
        list(&["images", "--filter", "reference=busy*", "-q"])
            .lines()
            .count()
            >= 1
    );
    assert!(
        daemon
            .docker_fails(&["images", "--filter", "color=red"])
            .contains("invalid filter 'color'")
    );
    daemon.docker(&["rm", "-f", "filter-one"]);
    // Prunes take only what their filters name, and say what they took.
    let pruned = list(&["container", "prune", "-f", "--filter", "label=f=2"]);
    assert!(pruned.contains("Deleted Containers"), "{pruned}");
    let pruned = list(&["network", "prune", "-f", "--filter", "label=f=1"]);
    assert!(pruned.contains("filter-net"), "{pruned}");
    let pruned = list(&["volume", "prune", "-a", "-f", "--filter", "label!=f=1"]);
    assert!(!pruned.contains("filter-vol"), "{pruned}");
    let pruned = list(&["volume", "prune", "-a", "-f", "--filter", "label=f=1"]);
    assert!(pruned.contains("filter-vol"), "{pruned}");
    assert!(
        daemon
            .docker_fails(&["container", "prune", "-f", "--filter", "color=red"])
            .contains("invalid filter")
    );
}

fn filters_that_fit_nothing_are_refused() {
    let Some(daemon) = has_busybox("wrong filters") else {
        return;
    };
    for filter in [
        "bogus=x",
        "status=bogus",
        "exited=x",
        "health=bogus",
        "is-task=maybe",
        "publish=http",
    ] {
        let said = daemon.docker_fails(&["ps", "--filter", filter]);
        assert!(said.contains("filter"), "{filter}: {said}");
    }
}

fn volumes_and_images_tell_what_happens_to_them() {
    let Some(daemon) = has_busybox("told") else {
        return;
    };
    let second = || {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let since = second().to_string();
    daemon.docker(&["volume", "create", "told-vol"]);
    daemon.docker(&[
        "run",
        "--name",
        "told",
        "-v",
        "told-vol:/v:ro",
        "busybox",
        "true",
    ]);
    daemon.docker(&["commit", "told", "told-image"]);
    daemon.docker(&["rm", "told"]);
    daemon.docker(&["volume", "rm", "told-vol"]);
    let until = (second() + 1).to_string();
    let events = |filter: &str, format: &str| {
        daemon.docker(&[
            "events", "--since", &since, "--until", &until, "--filter", filter, "--format", format,
        ])
    };
    let volume = events("volume=told-vol", "{{.Action}} {{json .Actor.Attributes}}");
    let actions: Vec<&str> = volume
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(
        actions,
        ["create", "mount", "unmount", "destroy"],
        "{volume}"
    );
    assert!(
        volume.contains(r#""destination":"/v""#) && volume.contains(r#""read/write":"false""#),
        "{volume}"
    );
    let commit = events("event=commit", "{{.Actor.Attributes.imageRef}}");
    assert!(
        commit.lines().any(|line| line == "told-image:latest"),
        "{commit}"
    );
    let tags = events("event=tag", "{{.Actor.Attributes.name}}");
    assert!(
        tags.lines().any(|line| line == "told-image:latest"),
        "{tags}"
    );
    daemon.docker(&["rmi", "told-image"]);
}

fn commands_and_tags_are_shown_as_dockers() {
    let Some(daemon) = has_busybox("shown") else {
        return;
    };
    daemon.docker(&[
        "run",
        "--name",
        "shown",
        "--log-opt",
        "tag={{.Name}}/{{.ImageName}}",
        "busybox",
        "sh",
        "-c",
        "echo one; echo two",
    ]);
    assert_eq!(
        daemon.docker(&[
            "ps",
            "-a",
            "--no-trunc",
            "--filter",
            "name=shown",
            "--format",
            "{{.Command}}",
        ]),
        r#""sh -c 'echo one; echo two'""#
    );
    assert_eq!(
        daemon.docker(&["logs", "--details", "--tail", "1", "shown"]),
        "tag=shown/busybox two"
    );
    assert_eq!(
        daemon.docker(&[
            "inspect",
            "-f",
            "{{.HostConfig.MemorySwappiness}} {{.HostConfig.PidsLimit}}",
            "shown",
        ]),
        "<nil> <nil>"
    );
    daemon.docker(&["rm", "shown"]);
    for (options, why) in [
        (&["--log-opt", "tag={{.Bogus}}"][..], ".Bogus"),
        (&["--tmpfs", "/x:bogus"], "invalid tmpfs option"),
        (
            &["--mount", "type=tmpfs,src=a,dst=/x"],
            "field Source must not be specified",
        ),
        (&["--cpuset-mems", "900"], "memory nodes are not available"),
        (&["--volume-driver", "nosuch", "-v", "named:/x"], "nosuch"),
    ] {
        let mut args = vec!["run", "--rm"];
        args.extend(options);
        args.extend(["busybox", "true"]);
        let said = daemon.docker_fails(&args);
        assert!(said.contains(why), "{options:?}: {said}");
        assert!(
            !said.contains("Unable to find image"),
            "{options:?}: {said}"
        );
    }
}
