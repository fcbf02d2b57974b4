//! Requests to the Hub, and the errors that its refusals stand for.

use reqwest::StatusCode;

use super::HubError;
use super::reference::Repository;

const TOKEN_IS_SET: &str = "HF_TOKEN must be the token of an account that may read it";
const TOKEN_IS_UNSET: &str = "for a private one set HF_TOKEN to a token of your account";

/// A request, with the names that errors use.
#[derive(Clone, Copy)]
pub(super) struct HubRequest<'a> {
    /// Path and query below the endpoint.
    pub(super) path: &'a str,
    /// Repository of the request.
    pub(super) repository: &'a Repository,
    /// Branch, tag or commit.
    pub(super) revision: &'a str,
    /// Path of the file in the repository; `None` for the list of files.
    pub(super) file: Option<&'a str>,
}

impl HubRequest<'_> {
    /// The request in words.
    pub(super) fn what(&self) -> String {
        let name = self.repository.name();
        match self.file {
            Some(file) => format!("`{file}` of `{name}`"),
            None => format!("the list of files of `{name}`"),
        }
    }
}

/// An error response that no repetition changes.
pub(super) struct Refusal<'a> {
    pub(super) status: StatusCode,
    /// The Hub's name of the error, such as `GatedRepo`; empty if it gives none.
    pub(super) code: &'a str,
    /// The Hub's own words.
    pub(super) message: &'a str,
    /// Base URL of the Hub.
    pub(super) endpoint: &'a str,
    /// Whether the request had a token.
    pub(super) has_token: bool,
}

impl Refusal<'_> {
    /// The error, with advice.
    pub(super) fn error(&self, request: HubRequest<'_>) -> HubError {
        let repository = request.repository.name().to_owned();
        let page = request.repository.page(self.endpoint);
        let is_gated = self.code == "GatedRepo" || self.message.contains("gated");
        match (self.status.as_u16(), self.code) {
            (401 | 403, _) if is_gated => HubError::Gated {
                repository,
                page,
                token_hint: self.token_hint(),
            },
            (404, "RevisionNotFound") => HubError::NoRevision {
                repository,
                revision: request.revision.to_owned(),
                page,
            },
            // The Hub answers 401 for a repository that does not exist, so that private ones are not found out.
            (_, "RepoNotFound") => self.no_repository(request),
            (404, _) => match request.file {
                Some(file) => HubError::NoFile {
                    repository,
                    file: file.to_owned(),
                    revision: request.revision.to_owned(),
                    page,
                },
                None => self.no_repository(request),
            },
            (401, _) if self.has_token => HubError::TokenRefused {
                endpoint: self.endpoint.to_owned(),
            },
            (401, _) => self.no_repository(request),
            (status, _) => HubError::Refused {
                what: request.what(),
                status,
                message: match self.message {
                    "" => String::new(),
                    message => format!(": {message}"),
                },
                page,
            },
        }
    }

    fn token_hint(&self) -> &'static str {
        match self.has_token {
            true => TOKEN_IS_SET,
            false => TOKEN_IS_UNSET,
        }
    }

    fn no_repository(&self, request: HubRequest<'_>) -> HubError {
        HubError::NoRepository {
            endpoint: self.endpoint.to_owned(),
            kind: request.repository.kind_name(),
            repository: request.repository.name().to_owned(),
            token_hint: self.token_hint(),
        }
    }
}
