//! Repositories, revisions and files that the Hub does not give, and the advice about them.

use std::ops::ControlFlow;

use potstill_teacher::hub::HubError;

use super::server::Fault;
use super::support::{MODEL, Setup, weights};

fn refused(setup: &Setup, name: &str, revision: &str) -> HubError {
    setup
        .fetch_as(name, revision, &mut |_| ControlFlow::Continue(()))
        .unwrap_err()
}

#[test]
fn each_refusal_has_its_own_advice() {
    let gated =
        "X-Error-Code: GatedRepo\r\nX-Error-Message: Access to model org/name is restricted\r\n";
    let unknown =
        "X-Error-Code: RepoNotFound\r\nX-Error-Message: Invalid username or password.\r\n";
    let cases: [(u16, &str, bool, &[&str]); 7] = [
        (
            403,
            gated,
            true,
            &["is gated", "/org/name", "HF_TOKEN must be"],
        ),
        (401, gated, false, &["is gated", "set HF_TOKEN to a token"]),
        (
            401,
            unknown,
            false,
            &["has no model `org/name`, or it is private", "set HF_TOKEN"],
        ),
        (401, "", true, &["refuses the token", "/settings/tokens"]),
        (
            404,
            "X-Error-Code: RepoNotFound\r\n",
            true,
            &["has no model `org/name`"],
        ),
        (
            404,
            "X-Error-Code: RevisionNotFound\r\n",
            true,
            &["has no revision `main`"],
        ),
        (
            451,
            "X-Error-Message: blocked by law\r\n",
            true,
            &["status 451: blocked by law"],
        ),
    ];
    for (status, headers, has_token, parts) in cases {
        let mut setup = Setup::new();
        if !has_token {
            setup.settings.token = None;
        }
        setup.server.fail("/api/", [Fault::Status(status, headers)]);
        let error = setup.error().to_string();
        for part in parts {
            assert!(error.contains(part), "{status}: {error}");
        }
        assert_eq!(setup.server.count("/api/"), 1, "{status} was repeated");
    }
}

#[test]
fn files_of_a_gated_model_and_of_a_vanished_commit_are_refused() {
    let setup = Setup::new();
    setup.server.fail(
        "resolve",
        [Fault::Status(403, "X-Error-Code: GatedRepo\r\n")],
    );
    assert!(matches!(setup.error(), HubError::Gated { .. }));
    setup.server.fail(
        "resolve",
        [Fault::Status(404, "X-Error-Code: EntryNotFound\r\n")],
    );
    assert!(matches!(setup.error(), HubError::NoFile { .. }));
}

#[test]
fn unknown_names_are_refused_by_name() {
    let setup = Setup::new();
    let error = refused(&setup, "org/other", "main");
    assert!(matches!(error, HubError::NoRepository { .. }) && error.is_about_the_name());
    let error = refused(&setup, "org/name/q4.gguf", "main");
    assert!(matches!(error, HubError::NoFile { .. }), "{error}");
}

#[test]
fn a_list_without_a_commit_is_refused() {
    let setup = Setup::new();
    setup.server.fail(
        "/api/",
        [Fault::Redirect(
            "/org/name/resolve/main/config.json".to_owned(),
        )],
    );
    let error = setup.error();
    assert!(matches!(error, HubError::Malformed { .. }), "{error}");
}

#[test]
fn pickle_and_paths_that_lead_outside_are_refused() {
    let setup = Setup::new();
    setup.server.add("org/old", "config.json", "{}");
    setup.server.add("org/old", "pytorch_model.bin", "pickle");
    let error = refused(&setup, "org/old", "main");
    assert!(matches!(error, HubError::PickleOnly { .. }), "{error}");
    assert_eq!(setup.server.count("resolve"), 0);

    let index = |file: &str| format!("{{\"weight_map\": {{\"a\": \"{file}\"}}}}");
    for file in [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x.safetensors",
        "a\\\\..\\\\x",
    ] {
        setup.server.add("org/bad", "config.json", "{}");
        setup
            .server
            .add("org/bad", "model.safetensors.index.json", index(file));
        setup.server.add("org/bad", file, "evil");
        let error = refused(&setup, "org/bad", "main");
        assert!(matches!(error, HubError::UnsafePath { .. }), "{error}");
    }
    let path = "model-1-of-2/../../../x.safetensors";
    setup.server.add("org/worse", "config.json", "{}");
    setup.server.add(
        "org/worse",
        "model.safetensors.index.json",
        index("model-1-of-1.safetensors"),
    );
    setup.server.add("org/worse", path, "evil");
    let error = refused(&setup, "org/worse", "main");
    assert!(matches!(error, HubError::UnsafePath { .. }), "{error}");
    assert_eq!(setup.server.count("evil"), 0);
}

#[test]
fn the_index_decides_which_shards_are_fetched() {
    let setup = Setup::new();
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "part.safetensors", "c": "part.safetensors"}}"#;
    for (file, content) in [
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.as_bytes().to_vec()),
        ("model-00001-of-00002.safetensors", weights(3000)),
        ("model-00002-of-00002.safetensors", weights(4000)),
        ("part.safetensors", weights(5000)),
    ] {
        setup.server.add("org/sharded", file, content);
    }
    let snapshot = setup
        .fetch_as("org/sharded", "main", &mut |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(
        snapshot.files,
        [
            "config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "part.safetensors"
        ]
    );
    assert!(std::fs::read(snapshot.folder.join("part.safetensors")).unwrap() == weights(5000));
    assert_eq!(setup.server.count("model-00002"), 0);

    setup.server.add(
        "org/sharded",
        "model.safetensors.index.json",
        index.replace("part", "absent"),
    );
    let error = refused(&setup, "org/sharded", "main");
    assert!(error.to_string().contains("absent.safetensors"), "{error}");
}

#[test]
fn a_name_with_a_file_fetches_that_file() {
    let setup = Setup::new();
    setup.server.add(MODEL, "q/tiny q8.gguf", weights(2000));
    let snapshot = setup.fetch_as("org/name/q/tiny q8.gguf", "main", &mut |_| {
        ControlFlow::Continue(())
    });
    let snapshot = snapshot.unwrap();
    assert_eq!(snapshot.files, ["q/tiny q8.gguf"]);
    assert!(std::fs::read(snapshot.folder.join("q/tiny q8.gguf")).unwrap() == weights(2000));
}
