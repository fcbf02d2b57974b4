//! The cache: its layout, use without a connection, several processes at once, damage, and full disks.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

use potstill_teacher::hub::{Hub, HubError, HubReference, Selection};

use super::server::{COMMIT, Fault, etag};
use super::support::{MODEL, Setup, weights};

#[test]
fn the_layout_is_that_of_huggingface_hub() {
    let setup = Setup::new();
    let snapshot = setup.fetch().unwrap();
    assert_eq!(snapshot.commit, COMMIT);
    assert_eq!(snapshot.folder, setup.cached("snapshots").join(COMMIT));
    assert_eq!(
        fs::read_to_string(setup.cached("refs/main")).unwrap(),
        COMMIT
    );
    let hash = etag(&weights(100_000));
    let link = fs::read_link(snapshot.folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(&hash));
    let lock = format!(".locks/models--org--name/{hash}.lock");
    assert!(setup.settings.cache.join(lock).exists());
}

#[test]
fn a_second_fetch_downloads_nothing_and_a_damaged_blob_is_replaced() {
    let setup = Setup::new();
    setup.fetch().unwrap();
    let downloads = setup.server.count("resolve");
    setup.assert_whole(&setup.fetch().unwrap());
    assert_eq!(setup.server.count("resolve"), downloads);

    let blob = setup.cached("blobs").join(etag(&weights(100_000)));
    for damaged in [vec![1; 100_000], vec![1; 50]] {
        fs::write(&blob, damaged).unwrap();
        setup.assert_whole(&setup.fetch().unwrap());
    }
}

#[test]
fn without_a_connection_the_cache_alone_is_used() {
    let mut setup = Setup::new();
    setup.settings.offline = true;
    let error = setup.error();
    assert!(matches!(error, HubError::NotCached { .. }), "{error}");
    setup.settings.offline = false;
    setup.fetch().unwrap();
    let requests = setup.server.seen().len();
    setup.settings.offline = true;
    setup.assert_whole(&setup.fetch().unwrap());
    let by_commit = setup.fetch_as(MODEL, COMMIT, &mut |_| ControlFlow::Continue(()));
    setup.assert_whole(&by_commit.unwrap());
    assert_eq!(setup.server.seen().len(), requests);

    let error = setup
        .fetch_as(MODEL, "v1", &mut |_| ControlFlow::Continue(()))
        .unwrap_err();
    assert!(
        error.to_string().contains("`org/name` at revision `v1`"),
        "{error}"
    );
    let blob = setup.cached("blobs").join(etag(&weights(100_000)));
    fs::write(&blob, vec![1; 100_000]).unwrap();
    let error = setup.error();
    assert!(matches!(error, HubError::DamagedCache { .. }), "{error}");
    fs::remove_file(&blob).unwrap();
    let error = setup.error();
    assert!(matches!(error, HubError::NotCached { .. }), "{error}");
}

#[test]
fn a_recorded_commit_is_found_without_a_request() {
    let setup = Setup::new();
    let snapshot = setup.fetch().unwrap();
    let requests = setup.server.seen().len();
    let repository = HubReference::model(MODEL).unwrap().repository;
    let found = |files: &[String]| Hub::fetched(&setup.settings, &repository, COMMIT, files);
    assert_eq!(found(&snapshot.files), Some(snapshot.folder.clone()));
    assert_eq!(found(&["absent".to_owned()]), None);
    assert_eq!(found(&["../../refs/main".to_owned()]), None);
    assert_eq!(found(&[]), None);
    assert_eq!(setup.server.seen().len(), requests);
}

#[test]
fn a_plan_says_what_is_missing_and_writes_nothing() {
    let setup = Setup::new();
    let hub = Hub::new(&setup.settings).unwrap();
    let repository = HubReference::model(MODEL).unwrap().repository;
    let mut observer = |_| ControlFlow::Continue(());
    let plan = hub
        .plan(&repository, "main", &Selection::Checkpoint, &mut observer)
        .unwrap();
    assert_eq!(plan.missing(), (3, 100_005));
    assert_eq!(plan.commit(), COMMIT);
    assert!(plan.free_bytes().is_some_and(|free| free > 0));
    assert!(!setup.settings.cache.exists());
}

#[test]
fn sizes_and_hashes_come_from_headers_if_the_list_has_none() {
    let setup = Setup::new();
    setup.server.leave_out_hashes();
    setup.assert_whole(&setup.fetch().unwrap());
    assert_eq!(setup.server.count("HEAD "), 3);
}

#[test]
fn two_at_once_download_each_file_once() {
    let setup = Setup::new();
    let pause = Fault::Pause(std::time::Duration::from_millis(300));
    setup.server.fail("cdn/", [pause]);
    std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| setup.fetch().unwrap()));
        for thread in both {
            setup.assert_whole(&thread.join().unwrap());
        }
    });
    assert_eq!(setup.server.count("cdn/"), 1);
}

/// Skipped where this user may not mount a file system.
#[test]
fn a_full_disk_is_a_sentence_and_the_download_goes_on_later() {
    let mut setup = Setup::new();
    let disk = setup.path("disk");
    fs::create_dir(&disk).unwrap();
    let mount = |options: &str| {
        let mut command = Command::new("mount");
        let command = command
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&disk);
        command
            .stderr(std::process::Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !mount("size=64k") {
        eprintln!("skipped: this user may not mount a small disk");
        return;
    }
    setup.settings.cache = disk.join("hub");
    let announced = setup.error();
    assert!(
        matches!(announced, HubError::TooLittleSpace { .. }),
        "{announced}"
    );
    // Another writer takes the space while the download runs.
    assert!(mount_again(&disk, "remount,size=200k"));
    let mut is_filled = false;
    let full = setup.fetch_as(MODEL, "main", &mut |event| {
        if !is_filled && matches!(event, potstill_teacher::hub::FetchEvent::Progress { .. }) {
            is_filled = true;
            fs::write(disk.join("other"), vec![0; 160 << 10]).unwrap();
        }
        ControlFlow::Continue(())
    });
    let full = full.unwrap_err();
    assert!(matches!(full, HubError::DiskFull { .. }), "{full}");
    fs::remove_file(disk.join("other")).unwrap();
    let result = std::panic::catch_unwind(|| {
        let snapshot = setup.fetch().unwrap();
        assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == weights(100_000));
    });
    let _ = Command::new("umount").arg(&disk).status();
    result.unwrap();
}

fn mount_again(disk: &Path, options: &str) -> bool {
    let mut command = Command::new("mount");
    command
        .args(["-o", options])
        .arg(disk)
        .status()
        .unwrap()
        .success()
}

/// Needs `POTSTILL_PYTHON`, the path of a Python with huggingface_hub.
#[test]
fn pythons_client_shares_the_cache_both_ways() {
    let Some(python) = std::env::var_os("POTSTILL_PYTHON") else {
        eprintln!("skipped: POTSTILL_PYTHON names no Python with huggingface_hub");
        return;
    };
    let patterns = "['config.json', 'tokenizer.json', 'model.safetensors']";
    let download = |setup: &Setup| {
        let script = format!(
            "from huggingface_hub import snapshot_download; print(snapshot_download('org/name', allow_patterns={patterns}))"
        );
        let output = Command::new(&python)
            .args(["-c", &script])
            .env("HF_ENDPOINT", setup.server.url())
            .env("HF_HUB_CACHE", &setup.settings.cache)
            .env("HF_HOME", setup.path("home"))
            .env("HF_HUB_DISABLE_XET", "1")
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let ours = Setup::new();
    let snapshot = ours.fetch().unwrap();
    let downloads = ours.server.count("GET /cdn/");
    assert_eq!(Path::new(&download(&ours)), snapshot.folder);
    assert_eq!(
        ours.server.count("GET /cdn/"),
        downloads,
        "Python downloaded again"
    );
    let theirs = Setup::new();
    let folder = download(&theirs);
    let downloads = theirs.server.count("GET /cdn/");
    assert_eq!(downloads, 1);
    let snapshot = theirs.fetch().unwrap();
    assert_eq!(Path::new(&folder), snapshot.folder);
    theirs.assert_whole(&snapshot);
    assert_eq!(
        theirs.server.count("GET /cdn/"),
        downloads,
        "Potstill downloaded again"
    );
}
